"""Marks the checkout as a package, so that tools can follow the relative imports between the four parts.

Nothing imports it. At run time the parts are `chatmill.data`, `chatmill.kernels`, ... through the links in `src/chatmill/`.
"""
