"""Training: replicas in lockstep, evaluated under named conditions. Knows no Ray."""
