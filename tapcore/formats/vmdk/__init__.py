"""vmdk: VMware's image format, one file a module.

    layout      structures of an extent file, limits, and its header validated
    descriptor  the text that says what extents a disk has, parsed and written
    mapping     guest offset to place in an extent file, over cached grain tables
    extent      one sparse extent as a driver
    writer      what changes an extent's mapping, and the order in which that reaches the file
    driver      a disk of one extent or several
    load        what opening reads
    stream      streamOptimized images, written and read from front to back
    create, check, tools
"""
