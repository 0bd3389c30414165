//! Networks of addresses: who may come from where.

use std::net::IpAddr;

use ipnet::IpNet;

/// A set of addresses, however many networks it was written as: looking one up takes the same few steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// First and last address of each stretch, in order; none touches the next one.
    v4: Box<[(u128, u128)]>,
    v6: Box<[(u128, u128)]>,
}

impl Networks {
    /// The addresses of all of `networks`.
    #[must_use]
    pub fn new(networks: &[IpNet]) -> Self {
        let of = |v4: bool| {
            let own = networks.iter().filter(|network| matches!(network, IpNet::V4(_)) == v4);
            stretches(own.map(|it| (number(it.network()), number(it.broadcast()))).collect())
        };
        Self { v4: of(true), v6: of(false) }
    }

    /// Whether an address is among them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let stretches = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        let address = number(address);
        let after = stretches.partition_point(|(first, _)| *first <= address);
        after > 0 && address <= stretches[after - 1].1
    }

    /// Whether there is no address among them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// Joins what touches or overlaps.
fn stretches(mut all: Vec<(u128, u128)>) -> Box<[(u128, u128)]> {
    all.sort_unstable();
    let mut joined: Vec<(u128, u128)> = Vec::with_capacity(all.len());
    for (first, last) in all {
        match joined.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined.into()
}

/// Which addresses may come: those that are allowed, without those that are denied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRules {
    /// None: all.
    pub allow: Option<Networks>,
    /// They go before those that are allowed.
    pub deny: Networks,
}

impl AddressRules {
    /// Whether a client may come; one without an address (on a Unix socket) is on no list.
    #[must_use]
    pub fn permit(&self, address: Option<IpAddr>) -> bool {
        let is_in = |networks: &Networks| address.is_some_and(|it| networks.contains(it));
        self.allow.as_ref().is_none_or(is_in) && !is_in(&self.deny)
    }

    /// Whether everybody may.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.allow.is_none() && self.deny.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn networks(texts: &[&str]) -> Networks {
        Networks::new(&texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>())
    }

    #[test]
    fn each_family_has_its_own_networks() {
        let all_of_v6 = networks(&["::/0"]);
        assert!(all_of_v6.contains("2001:db8::1".parse().unwrap()));
        assert!(!all_of_v6.contains("10.0.0.1".parse().unwrap()));
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert!(networks(&["10.0.0.0/8"]).contains(mapped) && !all_of_v6.contains(mapped));
    }

    #[test]
    fn what_is_denied_goes_before_what_is_allowed() {
        let rules = AddressRules {
            allow: Some(networks(&["10.0.0.0/8"])),
            deny: networks(&["10.1.0.0/16"]),
        };
        let permits = |text: &str| rules.permit(Some(text.parse().unwrap()));
        assert!(permits("10.0.0.1") && !permits("10.1.0.1") && !permits("11.0.0.1"));
        assert!(!rules.permit(None) && AddressRules::default().permit(None));
    }

    proptest! {
        #[test]
        fn it_holds_what_one_of_the_networks_holds(
            written in prop::collection::vec((any::<[u8; 4]>(), 0..=32_u8), 0..12),
            address: [u8; 4],
            near in 0..12_usize,
        ) {
            let written: Vec<IpNet> = written
                .iter()
                .map(|(address, length)| IpNet::new(IpAddr::from(*address), *length).unwrap())
                .collect();
            let mut asked = vec![IpAddr::from(address)];
            asked.extend(written.get(near).map(IpNet::broadcast));
            for address in asked {
                let expected = written.iter().any(|network| network.contains(&address));
                prop_assert_eq!(Networks::new(&written).contains(address), expected);
            }
        }
    }
}
