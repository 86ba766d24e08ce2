"""From files to their best classes: the parts of sasa-predict."""
