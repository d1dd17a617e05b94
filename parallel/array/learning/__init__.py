"""Estimators on split arrays, as scikit-learn has them: ``KMeans(k=8).fit(x).predict(x)``.

What is fitted does not depend on the number of ranks. One iteration is `Estimator.step`, so that a training loop can
call it; Lightning does so through `lightning_modules.arrays`.
"""

from parallel.array.learning.base import Estimator, Step, finite_rows
from parallel.array.learning.classifiers import KNN, GaussianNB, accuracy
from parallel.array.learning.components import DMD, PCA
from parallel.array.learning.k_means import KMeans, KMedians, KMedoids, MiniBatchKMeans, silhouette
from parallel.array.learning.lasso import Lasso, lasso_cv, lasso_path
from parallel.array.learning.regression import Ridge
from parallel.array.learning.scaling import MaxAbsScaler, MinMaxScaler, Normalizer, RobustScaler, StandardScaler
from parallel.array.learning.spectral import Spectral
from parallel.array.learning.statistics import Summary

__all__ = [
    "DMD",
    "KNN",
    "PCA",
    "Estimator",
    "GaussianNB",
    "KMeans",
    "KMedians",
    "KMedoids",
    "Lasso",
    "MaxAbsScaler",
    "MinMaxScaler",
    "MiniBatchKMeans",
    "Normalizer",
    "Ridge",
    "RobustScaler",
    "Spectral",
    "StandardScaler",
    "Step",
    "Summary",
    "accuracy",
    "finite_rows",
    "lasso_cv",
    "lasso_path",
    "silhouette",
]
