"""Images to train on: digits, CIFAR and folders, and how they are varied. It knows nothing of networks."""
