"""The step-aware preference model of SPO: a CLIP that scores images at every denoising timestep."""
