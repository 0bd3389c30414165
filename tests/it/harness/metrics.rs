//! What a gateway tells Prometheus.

use std::net::SocketAddr;

use super::get;

/// One look at `/metrics`.
pub(crate) struct Metrics(Vec<(String, f64)>);

impl Metrics {
    #[track_caller]
    pub(crate) fn of(address: SocketAddr) -> Self {
        let answer = get(address, "/metrics", &[]);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let line = |line: &str| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        };
        let text = answer.text();
        Self(text.lines().filter(|line| !line.starts_with('#')).map(line).collect())
    }

    /// The sum over all series of this name that have these labels (`model="m"`).
    pub(crate) fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let is_it = |known: &str| {
            let (own, rest) = known.split_once('{').unwrap_or((known, ""));
            own == name && labels.iter().all(|label| rest.contains(label))
        };
        // Without labels that is asked for, the series that is a sum itself does not count again.
        let has_labels = |known: &str| known.contains('{');
        let all: Vec<&(String, f64)> = self.0.iter().filter(|(known, _)| is_it(known)).collect();
        let labelled = all.iter().any(|(known, _)| has_labels(known));
        let counted = all.iter().filter(|(known, _)| !labelled || has_labels(known));
        counted.map(|(_, value)| value).sum()
    }

    /// The series that has no labels, if there is one.
    pub(crate) fn bare(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// The names of all series, without their labels.
    pub(crate) fn names(&self) -> Vec<&str> {
        let name = |(known, _): &'_ (String, f64)| known.split('{').next().map(str::len);
        self.0.iter().map(|it| &it.0[..name(it).unwrap_or_default()]).collect()
    }
}
