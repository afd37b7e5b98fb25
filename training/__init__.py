"""What train.py is made of: the run, the loop, what a checkpoint keeps, guards, validation, the result."""
