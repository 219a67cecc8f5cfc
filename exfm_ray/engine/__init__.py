"""Models spread over workers: tables by TorchRec, the dense part by DeepSpeed.

No other package imports those two libraries.
"""
