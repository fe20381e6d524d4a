"""The local viewer: a slide in the browser with maps over it, and questions asked by drawing."""
