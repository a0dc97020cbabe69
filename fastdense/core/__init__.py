"""The block itself: how features lie in memory, the primitives, and the schedule that is written in them."""
