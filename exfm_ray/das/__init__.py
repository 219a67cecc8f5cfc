"""The Data Augmentation System: labels a stream's windows with a teacher's predictions, once."""
