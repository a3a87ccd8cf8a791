"""Chapter 2: a router that knows what every engine has cached."""
