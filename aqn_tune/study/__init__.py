"""What a user declares, and everything that follows from it before anything runs. No torch, no Ray."""
