import io
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import Tensor

from covergenre.errors import CovergenreError, ModelError, StorageError
from covergenre.io import storage
from covergenre.models.networks import CoverModel, build_model
from covergenre.models.pretrained import LoadedWeights, load_backbone_weights

SHARED = Path(__file__).parents[4] / "shared" / "weights"
MOBILENET = SHARED / "mobilenet_v2_imagenet_fp16.safetensors"
VGG16_PARTIAL = SHARED / "vgg16_imagenet_features_block1-2_PARTIAL_fp16.safetensors"

Tensors = dict[str, Tensor]


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not in shared/weights")


def backbone_of(name: str, seed: int = 1) -> Tensors:
    return build_model(name, 2, seed=seed).backbone.state_dict()


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def torch_bytes(value: object, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def refused(
    tmp_path: Path, data: bytes | Tensors, code: str, model: str = "tiny", **options: Any
) -> str:
    """The message about a file with `data`; the backbone is not changed."""
    file = tmp_path / "w"
    file.write_bytes(data if isinstance(data, bytes) else safetensors.torch.save(data))
    subject = build_model(model, 2, seed=0)
    before = {name: tensor.clone() for name, tensor in subject.backbone.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(subject, str(file), **options)
    assert same(subject.backbone.state_dict(), before)
    message = str(caught.value)
    assert caught.value.code == code, message
    assert message.startswith(f"{file}: ") and "\n" not in message
    return message.removeprefix(f"{file}: ")


# What is accepted


@pytest.mark.parametrize(
    "encode",
    [
        safetensors.torch.save,
        torch_bytes,
        partial(torch_bytes, _use_new_zipfile_serialization=False),
        lambda state: torch_bytes({"state_dict": state, "epoch": 3}),
        lambda state: torch_bytes({f"module.{name}": t for name, t in state.items()}),
    ],
    ids=["safetensors", "torch", "torch-before-1.6", "state_dict", "module"],
)
def test_formats_are_detected_by_content(
    encode: Callable[[Tensors], bytes], tmp_path: Path
) -> None:
    file = tmp_path / "weights.bin"
    state = backbone_of("tiny")
    file.write_bytes(encode(state))
    model = build_model("tiny", 2, seed=0)
    assert load_backbone_weights(model, str(file)) == LoadedWeights(str(file), ())
    assert same(model.backbone.state_dict(), state)


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_backbone_is_loaded_from_a_model_directory_without_its_head(
    prefix: str, tmp_path: Path
) -> None:
    theirs = build_model("tiny", 9, seed=1).state_dict()
    state = {
        prefix.removesuffix("backbone.") + name: tensor.to(torch.bfloat16)
        for name, tensor in theirs.items()
    }
    assert f"{prefix}features.block1.conv.weight" in state
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model = build_model("tiny", 2, seed=0)
    head = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    assert load_backbone_weights(model, str(tmp_path / "model.safetensors")).missing == ()
    assert same(model.head.state_dict(), head)
    rounded = {n: t.bfloat16().float() for n, t in backbone_of("tiny", seed=1).items()}
    assert same(model.backbone.state_dict(), rounded)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("mobilenet_v2", "classifier.1."), ("resnet18", "fc.")],
)
def test_classifier_is_ignored_and_step_counts_may_be_missing(
    name: str, classifier: str, tmp_path: Path
) -> None:
    state = {n: t for n, t in backbone_of(name).items() if not n.endswith("num_batches_tracked")}
    whole = state | {f"{classifier}weight": torch.ones(1000, 4), f"{classifier}bias": torch.ones(1)}
    safetensors.torch.save_file(whole, tmp_path / "w")
    model = build_model(name, 2, seed=0)
    assert load_backbone_weights(model, str(tmp_path / "w")) == LoadedWeights(
        str(tmp_path / "w"), ()
    )
    found = model.backbone.state_dict()
    assert same({n: found[n] for n in state}, state)


def test_none_loads_nothing() -> None:
    model = build_model("tiny", 2, seed=0)
    assert load_backbone_weights(model, "none") == LoadedWeights("none", ())
    assert same(model.backbone.state_dict(), backbone_of("tiny", seed=0))


def test_partial_file_lists_missing_tensors(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    missing = ("features.block3.conv.bias", "features.block4.conv.weight")
    given = {name: t for name, t in state.items() if name not in missing}
    safetensors.torch.save_file(given, tmp_path / "w")
    model = build_model("tiny", 2, seed=0)
    loaded = load_backbone_weights(model, str(tmp_path / "w"), allow_partial=True)
    assert loaded.missing == missing
    random = backbone_of("tiny", seed=0)
    assert same(model.backbone.state_dict(), given | {name: random[name] for name in missing})
    message = refused(tmp_path, given, "missing_tensors")
    for fact in (missing[0], "1 more", "of 8 in tiny", "--allow-partial-weights"):
        assert fact in message


def test_missing_running_statistics_count_as_missing(tmp_path: Path) -> None:
    state = backbone_of("resnet18")
    del state["bn1.running_mean"]
    message = refused(tmp_path, state, "missing_tensors", "resnet18")
    assert message.startswith("bn1.running_mean ") and "of 100 " in message


@needs(MOBILENET)
def test_real_mobilenet_weights() -> None:
    model = build_model("mobilenet_v2", 5, seed=0)
    loaded = load_backbone_weights(model, str(MOBILENET))
    assert loaded == LoadedWeights(str(MOBILENET), ())
    real = safetensors.torch.load_file(MOBILENET)
    state = model.backbone.state_dict()
    assert {t.dtype for n, t in state.items() if "num_batches" not in n} == {torch.float32}
    for name in ("features.0.0.weight", "features.18.1.running_var"):
        assert torch.equal(state[name], real[name].float())


@needs(VGG16_PARTIAL)
def test_real_partial_vgg16_weights() -> None:
    with torch.device("meta"):
        model = build_model("vgg16", 5)
    model.backbone.to_empty(device="cpu")  # 59 MB, without the 480 MB of the head
    with pytest.raises(ModelError, match=r"features\.10\.weight and 17 more .* of 26"):
        load_backbone_weights(model, str(VGG16_PARTIAL))
    loaded = load_backbone_weights(model, str(VGG16_PARTIAL), allow_partial=True)
    assert loaded.missing[0] == "features.10.weight" and len(loaded.missing) == 18
    real = safetensors.torch.load_file(VGG16_PARTIAL)
    for name, tensor in real.items():
        assert torch.equal(model.backbone.state_dict()[name], tensor.float())


# What is refused


class Foreign:
    """Unpickling this would write the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "encode",
    [torch_bytes, partial(torch_bytes, _use_new_zipfile_serialization=False), pickle.dumps],
    ids=["torch", "torch-before-1.6", "pickle"],
)
def test_pickled_code_is_not_executed(encode: Callable[[object], bytes], tmp_path: Path) -> None:
    trace = tmp_path / "was run"
    refused(tmp_path, encode(backbone_of("tiny") | {"x": Foreign(trace)}), "not_only_tensors")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_weights"),
        (b"<html>moved</html>", "not_weights"),
        (safetensors.torch.save({"a": torch.ones(9)})[:-1], "damaged_weights"),
        (torch_bytes({"a": torch.ones(9)})[:-99], "damaged_weights"),
        (b"\x80\x02garbage", "not_only_tensors"),
        (torch_bytes([torch.ones(9)]), "not_weights"),
        (torch_bytes({"epoch": 3}), "not_only_tensors"),
    ],
    ids=["empty", "html", "cut safetensors", "cut torch", "garbage", "list", "no tensor"],
)
def test_other_and_damaged_files_are_refused(data: bytes, code: str, tmp_path: Path) -> None:
    refused(tmp_path, data, code)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_file_without_tensors_of_the_backbone_is_refused(
    allow_partial: bool, tmp_path: Path
) -> None:
    for data in ({"classifier.1.weight": torch.ones(2)}, {}):
        message = refused(tmp_path, data, "no_backbone_tensor", allow_partial=allow_partial)
        assert "tiny" in message and "features.block1.conv.weight" in message


@pytest.mark.parametrize("allow_partial", [False, True])
def test_unknown_tensors_are_refused(allow_partial: bool, tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["features.block2.conv.wieght"] = state.pop("features.block2.conv.weight")
    message = refused(tmp_path, state, "unknown_tensors", allow_partial=allow_partial)
    assert message.startswith("features.block2.conv.wieght ")
    assert "'features.block2.conv.weight'" in message
    state["zzz"] = torch.ones(1)
    assert "1 more" in refused(tmp_path, state, "unknown_tensors")
    message = refused(tmp_path, {"zzz": torch.ones(1)}, "unknown_tensors")
    assert "features" not in message  # no list of hundreds of names


def test_weights_of_another_model_name_that_model(tmp_path: Path) -> None:
    message = refused(tmp_path, backbone_of("resnet18"), "unknown_tensors", "mobilenet_v2")
    for fact in ("bn1.bias", "119 more", "mobilenet_v2", "--model resnet18"):
        assert fact in message


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["features.block1.conv.weight"] = torch.ones(16, 1, 3, 3)
    state["features.block2.conv.bias"] = torch.ones(())
    message = refused(tmp_path, state, "other_shapes")
    for fact in ("features.block1.conv.weight", "1 more", "16 x 1 x 3 x 3", "16 x 3 x 3 x 3"):
        assert fact in message


def test_values_that_cannot_be_weights_are_refused(tmp_path: Path) -> None:
    name = "features.block1.conv.bias"
    nan = backbone_of("tiny") | {name: torch.full((16,), torch.nan)}
    assert name in refused(tmp_path, nan, "not_finite")
    whole = backbone_of("tiny") | {name: torch.ones(16, dtype=torch.int8)}
    assert f"{name} is torch.int8" in refused(tmp_path, whole, "not_float")


def test_tensor_with_two_names_is_refused(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["backbone.features.block1.conv.bias"] = torch.ones(16)
    assert "features.block1.conv.bias" in refused(tmp_path, state, "duplicate_tensor")


# Where files come from


@pytest.fixture
def tiny() -> CoverModel:
    return build_model("tiny", 2, seed=0)


def test_weights_are_read_from_file_uris_and_s3(
    tiny: CoverModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = safetensors.torch.save(backbone_of("tiny"))
    (tmp_path / "w").write_bytes(data)
    assert load_backbone_weights(tiny, f"file://{tmp_path}/w").origin == f"file://{tmp_path}/w"

    uris: list[str] = []

    def read_bytes(uri: str) -> bytes:
        uris.append(uri)
        return data

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert load_backbone_weights(tiny, "s3://bucket/w").missing == ()
    assert uris == ["s3://bucket/w"]


@pytest.mark.parametrize(
    ("weights", "error", "code"),
    [
        ("imagnet", ModelError, "no_weights_file"),
        ("/nowhere/absent.pth", StorageError, "not_found"),
        ("/", ModelError, "is_a_directory"),
        ("gs://bucket/w", StorageError, "unsupported_scheme"),
    ],
)
def test_path_that_is_not_a_file_is_an_error(
    weights: str,
    error: type[CovergenreError],
    code: str,
    tiny: CoverModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        load_backbone_weights(tiny, weights)
    assert caught.value.code == code and weights in str(caught.value)
    assert ("'imagenet'" in str(caught.value)) == (weights == "imagnet")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine that serves tmp_path."""
    handler: Callable[..., BaseHTTPRequestHandler] = partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_are_downloaded(tiny: CoverModel, host: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(backbone_of("tiny"), tmp_path / "w")
    loaded = load_backbone_weights(tiny, f"{host}/w?X-Amz-Signature=secret")
    assert loaded == LoadedWeights(f"{host}/w", ())
    assert same(tiny.backbone.state_dict(), backbone_of("tiny"))


def test_failed_download_is_an_error_without_secrets(tiny: CoverModel, host: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(tiny, f"{host}/absent?key=secret")
    assert caught.value.code == "download_failed"
    assert str(caught.value).startswith(f"{host}/absent: ") and "404" in str(caught.value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as closed:
        port = closed.server_port
    with pytest.raises(ModelError, match=rf"^http://127\.0\.0\.1:{port}/w: ") as caught:
        load_backbone_weights(tiny, f"http://127.0.0.1:{port}/w")
    assert caught.value.code == "download_failed"


# Weights of torchvision


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's directory of downloads, empty; the network is unreachable."""

    def unreachable(request: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_are_read_from_the_cache(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = backbone_of("mobilenet_v2")
    torch.save(
        state | {"classifier.1.bias": torch.ones(1000)}, checkpoints / "mobilenet_v2-b0353104.pth"
    )
    model = build_model("mobilenet_v2", 2, seed=0)
    assert load_backbone_weights(model, "imagenet") == LoadedWeights(
        "MobileNet_V2_Weights.IMAGENET1K_V1", ()
    )
    assert same(model.backbone.state_dict(), state)
    assert capsys.readouterr().out == ""


def test_unreachable_imagenet_weights_are_an_error(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model("mobilenet_v2", 2, seed=0)
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(model, "imagenet")
    assert caught.value.code == "download_failed"
    for fact in ("/mobilenet_v2-b0353104.pth: ", "Name or service not known", "--weights FILE"):
        assert fact in str(caught.value)
    assert capsys.readouterr().out == ""  # standard output is for results


def test_download_that_cannot_be_saved_is_an_error(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoints / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(checkpoints / "file"))
    with pytest.raises(ModelError, match=r"Not a directory: .*--weights FILE") as caught:
        load_backbone_weights(build_model("mobilenet_v2", 2, seed=0), "imagenet")
    assert caught.value.code == "download_failed"


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04 cut short", b"", b"text", pickle.dumps(Foreign(Path()))], ids=range(4)
)
def test_damaged_cache_of_imagenet_weights_is_an_error(data: bytes, checkpoints: Path) -> None:
    (checkpoints / "mobilenet_v2-b0353104.pth").write_bytes(data)
    with pytest.raises(ModelError, match=r"mobilenet_v2-b0353104\.pth: ") as caught:
        load_backbone_weights(build_model("mobilenet_v2", 2, seed=0), "imagenet")
    assert caught.value.code == "damaged_weights"


def test_model_without_imagenet_weights_is_an_error(tiny: CoverModel) -> None:
    with pytest.raises(ModelError, match=r"tiny.*vgg16") as caught:
        load_backbone_weights(tiny, "imagenet")
    assert caught.value.code == "no_imagenet_weights"
