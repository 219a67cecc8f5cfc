"""The one streaming loop. The FM job and the VM jobs are two uses of it, run by Ray Train."""
