"""MovieLens (https://grouplens.org/datasets/movielens/): a rating of four stars or more is a
`like`."""

from __future__ import annotations

from exfm_ray.config.root import Config
from exfm_ray.data.prepare.sequence_feature import History
from exfm_ray.data.sources.base import RawSource, read_csv, require, sequence
from exfm_ray.schema import Kind, Schema, SparseFeature

LIKES = 20
RATING_TYPES = {
    "userId": "BIGINT",
    "movieId": "BIGINT",
    "rating": "DOUBLE",
    "timestamp": "BIGINT",
}
MOVIE_TYPES = {
    "movieId": "BIGINT",
    "genres": "VARCHAR",
}


def source(config: Config) -> RawSource:
    """ratings.csv with the genres of movies.csv, ordered by time, then user and movie."""
    ratings = require(config.data.root, "ratings.csv")
    movies = require(config.data.root, "movies.csv")
    rating = read_csv([ratings], RATING_TYPES)
    movie = read_csv([movies], MOVIE_TYPES)
    query = f"""
        WITH movies AS (SELECT * FROM {movie} QUALIFY row_number() OVER (PARTITION BY movieId) = 1)
        SELECT r.timestamp * 1000 AS event_time, (r.rating >= 4)::DOUBLE AS "like",
               r.userId AS "user", r.movieId AS movie, string_split(m.genres, '|') AS genres
        FROM {rating} r LEFT JOIN movies m ON r.movieId = m.movieId
        ORDER BY r.timestamp, r.userId, r.movieId, r.rating"""
    return RawSource(
        schema=_schema(config.data.hash_rows),
        files=(ratings, movies),
        query=query,
        history=History(
            feature="liked_movies",
            user="user",
            item="movie",
            label="like",
            length=LIKES,
        ),
    )


def _schema(rows: int) -> Schema:
    movie = SparseFeature(name="movie", rows=rows)
    genres = SparseFeature(name="genres", kind=Kind.MULTI, rows=min(rows, 200), max_length=10)
    return Schema(
        features=(
            SparseFeature(name="user", rows=rows),
            movie,
            genres,
            sequence("liked_movies", movie, LIKES),
        ),
        tasks=("like",),
        group_by="user",
    )
