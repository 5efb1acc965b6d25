//! Values of a Parquet file as JSON, for the metadata column.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Date64Type, Decimal128Type, Decimal256Type, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type,
    Int32Type, Int64Type, Time32MillisecondType, Time32SecondType, Time64MicrosecondType, Time64NanosecondType,
    TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, TimeUnit};
use serde_json::{Map, Value};

/// The value in `row`; none for bytes and other types that JSON has no word for. Dates and times are ISO 8601.
pub(super) fn value(array: &dyn Array, row: usize) -> Option<Value> {
    if array.is_null(row) {
        return Some(Value::Null);
    }
    macro_rules! number {
        ($type:ty) => {
            Value::from(array.as_primitive::<$type>().value(row))
        };
    }
    macro_rules! time {
        ($type:ty, $method:ident, $format:literal) => {
            Value::from(array.as_primitive::<$type>().$method(row)?.format($format).to_string())
        };
    }
    Some(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        // NaN and infinities become null, as in sidecars.
        DataType::Float16 => array.as_primitive::<Float16Type>().value(row).to_f32().into(),
        DataType::Float32 => shortest(array.as_primitive::<Float32Type>().value(row)),
        DataType::Float64 => number!(Float64Type),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value_as_string(row).into(),
        DataType::Decimal256(..) => array.as_primitive::<Decimal256Type>().value_as_string(row).into(),
        DataType::Date32 => time!(Date32Type, value_as_date, "%Y-%m-%d"),
        DataType::Date64 => time!(Date64Type, value_as_date, "%Y-%m-%d"),
        DataType::Time32(TimeUnit::Second) => time!(Time32SecondType, value_as_time, "%H:%M:%S%.f"),
        DataType::Time32(_) => time!(Time32MillisecondType, value_as_time, "%H:%M:%S%.f"),
        DataType::Time64(TimeUnit::Microsecond) => time!(Time64MicrosecondType, value_as_time, "%H:%M:%S%.f"),
        DataType::Time64(_) => time!(Time64NanosecondType, value_as_time, "%H:%M:%S%.f"),
        DataType::Timestamp(unit, zone) => {
            let time = match unit {
                TimeUnit::Second => array.as_primitive::<TimestampSecondType>().value_as_datetime(row),
                TimeUnit::Millisecond => array.as_primitive::<TimestampMillisecondType>().value_as_datetime(row),
                TimeUnit::Microsecond => array.as_primitive::<TimestampMicrosecondType>().value_as_datetime(row),
                TimeUnit::Nanosecond => array.as_primitive::<TimestampNanosecondType>().value_as_datetime(row),
            };
            let zone = if zone.is_some() { "Z" } else { "" };
            format!("{}{zone}", time?.format("%Y-%m-%dT%H:%M:%S%.f")).into()
        }
        DataType::List(_) => list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => list(&array.as_fixed_size_list().value(row)),
        DataType::Struct(fields) => {
            let columns = fields.iter().zip(array.as_struct().columns());
            let pairs = columns.filter_map(|(field, column)| Some((field.name().clone(), value(column, row)?)));
            Value::Object(pairs.collect())
        }
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let (keys, values) = (entries.column(0), entries.column(1));
            let pairs = (0..entries.len()).filter_map(|entry| {
                let key = match value(keys, entry)? {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                Some((key, value(values, entry)?))
            });
            Value::Object(pairs.collect::<Map<_, _>>())
        }
        _ => return None,
    })
}

fn list(items: &ArrayRef) -> Value {
    Value::Array((0..items.len()).map(|item| value(items, item).unwrap_or(Value::Null)).collect())
}

/// 0.1 as a 32-bit float is 0.1, not 0.10000000149011612.
fn shortest(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
