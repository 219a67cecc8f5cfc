"""What trainers and DAS share: snapshots, supervision, shared rows, user histories."""
