"""What sasa-evaluate computes beyond sums: calibration, ImageNet-ReaL, paired tests; its lines and files."""
