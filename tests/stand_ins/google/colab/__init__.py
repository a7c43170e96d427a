"What the tutorials use of Colab, for machines that are not Colab's."
