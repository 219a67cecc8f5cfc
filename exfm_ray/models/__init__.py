"""Pure torch: embeddings, interaction models, heads. Runs on one device, without Ray, DeepSpeed or
TorchRec."""
