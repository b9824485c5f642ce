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

from covergenre.errors import ModelError, StorageError
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


def refused(tmp_path: Path, data: bytes | Tensors, model: str = "tiny", **options: Any) -> str:
    """The message about a file `w` that holds `data`; the backbone must stay as it was."""
    file = tmp_path / "w"
    file.write_bytes(data if isinstance(data, bytes) else safetensors.torch.save(data))
    subject = build_model(model, 2, seed=0)
    before = {name: tensor.clone() for name, tensor in subject.backbone.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(subject, str(file), **options)
    assert same(subject.backbone.state_dict(), before)
    message = str(caught.value)
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
def test_formats_are_told_by_content(encode: Callable[[Tensors], bytes], tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    state = backbone_of("tiny")
    file.write_bytes(encode(state))
    model = build_model("tiny", 2, seed=0)
    assert load_backbone_weights(model, str(file)) == LoadedWeights(str(file), ())
    assert same(model.backbone.state_dict(), state)


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_a_models_own_file_and_no_head(prefix: str, tmp_path: Path) -> None:
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
def test_classifier_is_passed_over_and_step_counts_may_be_missing(
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


def test_partial_file_names_what_stays_random(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    missing = ("features.block3.conv.bias", "features.block4.conv.weight")
    given = {name: t for name, t in state.items() if name not in missing}
    safetensors.torch.save_file(given, tmp_path / "w")
    model = build_model("tiny", 2, seed=0)
    loaded = load_backbone_weights(model, str(tmp_path / "w"), allow_partial=True)
    assert loaded.missing == missing
    random = backbone_of("tiny", seed=0)
    assert same(model.backbone.state_dict(), given | {name: random[name] for name in missing})
    assert refused(tmp_path, given) == (
        "features.block3.conv.bias and 1 more are missing, of 8 in tiny; to leave what is missing"
        " random: --allow-partial-weights"
    )


def test_missing_running_statistics_count_as_missing(tmp_path: Path) -> None:
    state = backbone_of("resnet18")
    del state["bn1.running_mean"]
    assert refused(tmp_path, state, "resnet18").startswith("bn1.running_mean is missing, of 100")


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
    model.backbone.to_empty(device="cpu")  # 59 MB; the head's 480 stay unmade
    with pytest.raises(ModelError, match=r"features\.10\.weight and 17 more are missing, of 26"):
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
def test_nothing_pickled_is_run(encode: Callable[[object], bytes], tmp_path: Path) -> None:
    trace = tmp_path / "was run"
    assert refused(tmp_path, encode(backbone_of("tiny") | {"x": Foreign(trace)})) == (
        "only tensors are loaded, and this torch file holds other objects; save its state_dict()"
        " alone, best as safetensors"
    )
    assert not trace.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is neither a safetensors nor a torch file"),
        (b"<html>moved</html>", "is neither a safetensors nor a torch file"),
        (safetensors.torch.save({"a": torch.ones(9)})[:-1], "damaged safetensors: "),
        (torch_bytes({"a": torch.ones(9)})[:-99], "is no readable torch file: "),
        (b"\x80\x02garbage", "only tensors are loaded"),
        (torch_bytes([torch.ones(9)]), "holds a list, not named tensors"),
        (torch_bytes({"epoch": 3}), "'epoch' is a int, not a tensor"),
    ],
    ids=["empty", "html", "cut safetensors", "cut torch", "garbage", "list", "no tensor"],
)
def test_files_of_another_kind(data: bytes, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, data).startswith(message)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_file_with_nothing_of_the_backbone(allow_partial: bool, tmp_path: Path) -> None:
    head = {"classifier.1.weight": torch.ones(2)}
    message = (
        "holds no tensor of tiny's backbone; expected features.block1.conv.weight and the like"
    )
    assert refused(tmp_path, head, allow_partial=allow_partial) == message
    assert refused(tmp_path, {}, allow_partial=allow_partial) == message


@pytest.mark.parametrize("allow_partial", [False, True])
def test_unknown_names(allow_partial: bool, tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["features.block2.conv.wieght"] = state.pop("features.block2.conv.weight")
    assert refused(tmp_path, state, allow_partial=allow_partial) == (
        "features.block2.conv.wieght is not in tiny; did you mean 'features.block2.conv.weight'?"
    )
    state["zzz"] = torch.ones(1)
    assert "and 1 more are not in tiny" in refused(tmp_path, state)
    only = {"zzz": torch.ones(1)}
    assert refused(tmp_path, only) == "zzz is not in tiny"  # and no list of hundreds of names


def test_another_models_file_names_that_model(tmp_path: Path) -> None:
    assert refused(tmp_path, backbone_of("resnet18"), "mobilenet_v2") == (
        "bn1.bias and 119 more are not in mobilenet_v2; the file fits --model resnet18"
    )


def test_wrong_shapes(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["features.block1.conv.weight"] = torch.ones(16, 1, 3, 3)
    state["features.block2.conv.bias"] = torch.ones(())
    assert refused(tmp_path, state) == (
        "features.block1.conv.weight and 1 more are of another shape than in tiny:"
        " features.block1.conv.weight is 16 x 1 x 3 x 3, not 16 x 3 x 3 x 3"
    )


def test_numbers_that_cannot_be_weights(tmp_path: Path) -> None:
    name = "features.block1.conv.bias"
    nan = backbone_of("tiny") | {name: torch.full((16,), torch.nan)}
    assert refused(tmp_path, nan) == f"{name} holds numbers that are not finite"
    whole = backbone_of("tiny") | {name: torch.ones(16, dtype=torch.int8)}
    assert refused(tmp_path, whole) == f"{name} is torch.int8; give weights of floating point"


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    state = backbone_of("tiny")
    state["backbone.features.block1.conv.bias"] = torch.ones(16)
    assert refused(tmp_path, state) == (
        "holds features.block1.conv.bias twice, under different prefixes"
    )


# Where files come from


@pytest.fixture
def tiny() -> CoverModel:
    return build_model("tiny", 2, seed=0)


def test_file_uri_and_s3(tiny: CoverModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = safetensors.torch.save(backbone_of("tiny"))
    (tmp_path / "w").write_bytes(data)
    assert load_backbone_weights(tiny, f"file://{tmp_path}/w").origin == f"file://{tmp_path}/w"

    asked: list[str] = []

    def read_bytes(uri: str) -> bytes:
        asked.append(uri)
        return data

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    assert load_backbone_weights(tiny, "s3://bucket/w").missing == ()
    assert asked == ["s3://bucket/w"]


def test_no_such_file(tiny: CoverModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no file 'imagnet'; did you mean 'imagenet'"):
        load_backbone_weights(tiny, "imagnet")
    with pytest.raises(StorageError, match="no such file"):
        load_backbone_weights(tiny, str(tmp_path / "absent.pth"))
    with pytest.raises(ModelError, match="is a directory"):
        load_backbone_weights(tiny, str(tmp_path))
    with pytest.raises(StorageError, match="gs:// is not supported"):
        load_backbone_weights(tiny, "gs://bucket/w")


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


def test_http(tiny: CoverModel, host: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(backbone_of("tiny"), tmp_path / "w")
    loaded = load_backbone_weights(tiny, f"{host}/w?X-Amz-Signature=secret")
    assert loaded == LoadedWeights(f"{host}/w", ())
    assert same(tiny.backbone.state_dict(), backbone_of("tiny"))


def test_http_errors(tiny: CoverModel, host: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(tiny, f"{host}/absent?key=secret")
    assert str(caught.value) == (
        f"{host}/absent: its host answered 404 File not found; give a file instead:"
        " --weights FILE, with torchvision's names, in safetensors or .pth"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as closed:
        port = closed.server_port
    with pytest.raises(ModelError, match=rf"^http://127\.0\.0\.1:{port}/w: its host could not be"):
        load_backbone_weights(tiny, f"http://127.0.0.1:{port}/w")


# torchvision's own weights


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of downloads: empty, and no network behind it."""

    def unreachable(request: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_imagenet_out_of_reach(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("mobilenet_v2", 2, seed=0)
    with pytest.raises(ModelError) as caught:
        load_backbone_weights(model, "imagenet")
    assert str(caught.value) == (
        "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth: its host could not be"
        " reached: Name or service not known; give a file instead: --weights FILE, with"
        " torchvision's names, in safetensors or .pth"
    )
    assert capsys.readouterr().out == ""  # standard output is for results


def test_imagenet_that_cannot_be_stored(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoints / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(checkpoints / "file"))
    with pytest.raises(ModelError, match=r"cannot be stored here: Not a directory: .*give a file"):
        load_backbone_weights(build_model("mobilenet_v2", 2, seed=0), "imagenet")


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04 cut short", b"", b"text", pickle.dumps(Foreign(Path()))], ids=range(4)
)
def test_imagenet_with_a_damaged_copy(data: bytes, checkpoints: Path) -> None:
    (checkpoints / "mobilenet_v2-b0353104.pth").write_bytes(data)
    with pytest.raises(ModelError, match=r"mobilenet_v2-b0353104\.pth: the download, or its copy"):
        load_backbone_weights(build_model("mobilenet_v2", 2, seed=0), "imagenet")


def test_imagenet_for_a_model_that_has_none(tiny: CoverModel) -> None:
    with pytest.raises(ModelError, match="there are none for tiny; use --weights none, or one of"):
        load_backbone_weights(tiny, "imagenet")
