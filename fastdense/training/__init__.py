"""Training an image classifier: the experiment, its steps and events, and what a long run leaves behind."""
