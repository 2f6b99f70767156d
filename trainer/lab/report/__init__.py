"""What did a run do, or several beside each other? One HTML file, from the records that a run leaves."""
