"""The parts of ``train_brain.py``: volume, network, training, memory, pictures."""
