"""The Data Augmentation System: FM snapshots in, supervision beside the training data out, once per
example."""
