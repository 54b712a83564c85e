"""The course: editions of the chapters, slides, assignments with a grader, projects.

Everything is made from the chapters and from the files here; the book's page *Teaching with this
book* says how.  Not part of the package that is installed.
"""
