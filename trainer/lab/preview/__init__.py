"""What will a run do, step by step? Its program, drawn before anything is trained."""
