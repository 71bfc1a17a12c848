"""The book: its images, scales, chapters, figures, explorer and report, all made with `patchsae`."""
