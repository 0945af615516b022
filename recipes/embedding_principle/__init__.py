"""The papers' experiments on the embedding principle, each reproduced by one script.

python -m recipes.embedding_principle.NAME [--quick] [--out FOLDER] [--seed 0] [--threads 1]
"""
