"""Pure torch: embeddings, interaction models and heads.

The package runs on one device, without Ray, DeepSpeed or TorchRec.
"""
