"""What does a run do right now? A frame of text in a terminal, from the records that the run writes."""
