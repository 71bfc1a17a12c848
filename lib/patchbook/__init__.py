"""The book: its images, scales, chapters, figures and report, all made with `patchsae`."""
