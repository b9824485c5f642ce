"""Networks, pretrained weights and the model bundle."""
