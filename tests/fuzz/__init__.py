"""What happens to settings that nobody would write? Cases are drawn from a seed and can be drawn again."""
