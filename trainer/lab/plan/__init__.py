"""What will a run need, what bounds it, and which layout is best? Before a GPU hour is spent."""
