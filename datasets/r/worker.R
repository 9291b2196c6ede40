# A worker that is ready once it has fitted a model.
set.seed(7)
data <- data.frame(x = 1:100)
data$y <- 3 * data$x + rnorm(100)
fit <- lm(y ~ x, data)
stopifnot(abs(coef(fit)[["x"]] - 3) < 0.1)
cat("READY\n")
Sys.sleep(3600)
