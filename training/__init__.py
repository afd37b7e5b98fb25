"""What train.py is made of: arguments, models, data, noising, checkpoints, logging."""
