"""How a model is spread over workers: tables by TorchRec, the dense part by DeepSpeed. Nothing else
imports those two."""
