"""Jobs on clusters: Ray Jobs, SLURM and KubeRay behind one interface."""
