//! Numbers as digits, for what every exchange writes: `format!` takes ten times as long.

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The last `N` hexadecimal digits of a number.
#[must_use]
pub fn hex<const N: usize>(number: u128) -> [u8; N] {
    let mut text = [0; N];
    let mut rest = number;
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[(rest & 0xf) as usize];
        rest >>= 4;
    }
    text
}

/// The same behind a text.
pub fn push_hex<const N: usize>(text: &mut String, number: u128) {
    text.extend(hex::<N>(number).map(char::from));
}

/// A number in decimal digits, at least `least` of them, behind a text.
pub fn push_decimal(text: &mut impl Extend<u8>, number: u64, least: usize) {
    // 2^64 has twenty.
    let mut digits = [b'0'; 20];
    let (mut rest, mut begin) = (number, digits.len());
    while rest > 0 {
        begin -= 1;
        digits[begin] = DIGITS[(rest % 10) as usize];
        rest /= 10;
    }
    text.extend(digits[begin.min(digits.len() - least)..].iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_standard_library() {
        for number in [0, 1, 0xa, 0x10, 0xdead_beef, u128::MAX, 0x1234_5678_9abc_def0 << 60] {
            assert_eq!(hex::<32>(number), format!("{number:032x}").as_bytes());
            let mut text = "x".to_owned();
            push_hex::<32>(&mut text, number);
            assert_eq!(text, format!("x{number:032x}"));
        }
        assert_eq!(hex::<4>(0xa_bcde), *b"bcde");
        for number in [0, 1, 9, 10, 100, 999, 1000, u64::MAX] {
            let mut text = b"x".to_vec();
            push_decimal(&mut text, number, 1);
            push_decimal(&mut text, number, 3);
            assert_eq!(text, format!("x{number}{number:03}").as_bytes());
        }
    }
}
