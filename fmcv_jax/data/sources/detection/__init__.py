"""Sources of images with objects: boxes, classes and masks, in the layouts of other tools."""
