"""What runs inside a sandbox: an IPython kernel that caps what it says and repairs itself.

Everything here is a courtesy of honest code: the client checks again whatever it hears. Imports
nothing of this package but itself, so that the folder alone can be mounted into a container.
"""
