"""The functions of `import trapline`, one file each: from a kernel and options to a document.

They put the rooms below together and print nothing; the command line is one of their users.
"""
