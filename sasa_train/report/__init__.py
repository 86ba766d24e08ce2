"""sasa-report: from the folders of a sweep to a table with intervals and to pictures."""
