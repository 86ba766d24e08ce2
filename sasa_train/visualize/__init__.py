"""sasa-visualize: what a run learnt and what its attention looks at, as pictures."""
