"""FM, DAS and VMs over the windows of a stream."""
