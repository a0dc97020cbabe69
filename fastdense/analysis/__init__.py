"""What flows through a network's layers, which features its layers use, and the pictures of both."""
