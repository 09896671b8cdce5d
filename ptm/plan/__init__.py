"""`ptm plan`: what a run will need, told by compiling its own training step for devices that are not there."""
