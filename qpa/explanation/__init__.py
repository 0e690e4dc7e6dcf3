"""What the parts of a trained generator contribute: what is changed of each, and what the losses then say."""
