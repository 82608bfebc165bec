# Under pgbench, all the way: 0003 to 0005 and back, then 0002 and back.
#
# No transaction fails, and at every stage the table holds what was written:
# rm_lab_check() compares each value with its row's name, and a ledger, which
# the same transactions write, says which rows there are and what they are
# called.  One snapshot sees both, so they are compared while pgbench goes on.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 50_000;
my $clients = 4;

my $node = start_lab('pgbench_migration', $rows, '');

# The rows up to id 1000 belong to lab_write(), which tells nobody which one it
# has updated; the ledger knows all the others.
sql(q{
CREATE TABLE ledger (id bigint PRIMARY KEY, name text NOT NULL);
INSERT INTO ledger SELECT id, name FROM large_record WHERE id > 1000;
CREATE TABLE calls (n bigint);
CREATE SEQUENCE moments START 1000000;
VACUUM ANALYZE;
});

# The moment of a transaction is its own, and so is the name.  The ledger's row
# is taken first, so that no two clients are at one row, and rows are taken in
# the order of their ids, so that the clients cannot deadlock each other.  The
# cast makes one statement fit both types of the column.
my $moment = 'risky_migrations.lab_moment(:n)';
my $next = q{SELECT nextval('moments') AS n \gset};
my %script = (
	insert => [
		5, qq{
$next
BEGIN;
INSERT INTO large_record (name, created_at)
	VALUES ('written ' || $moment, $moment\::timestamp) RETURNING id \\gset
INSERT INTO ledger VALUES (:id, 'written ' || $moment);
END;
} ],
	update => [
		8, qq{
\\set id random(1001, $rows)
$next
BEGIN;
UPDATE ledger SET name = 'written ' || $moment WHERE id = :id;
UPDATE large_record SET name = 'written ' || $moment, created_at = $moment\::timestamp
	WHERE id = :id;
END;
} ],
	replace => [
		3, qq{
\\set id random(1001, $rows)
$next
BEGIN;
UPDATE ledger SET name = 'written ' || $moment WHERE id = :id;
DELETE FROM large_record WHERE id = :id;
INSERT INTO large_record (id, name, created_at)
	VALUES (:id, 'written ' || $moment, $moment\::timestamp);
END;
} ],
	several => [
		3, qq{
\\set a random(1001, $rows)
\\set b random(1001, $rows)
\\set id least(:a, :b)
\\set id2 greatest(:a, :b)
$next
BEGIN;
UPDATE ledger SET name = 'written ' || $moment WHERE id = :id;
UPDATE large_record SET name = 'written ' || $moment, created_at = $moment\::timestamp
	WHERE id = :id;
$next
UPDATE ledger SET name = 'written ' || $moment WHERE id = :id2;
SAVEPOINT s;
UPDATE large_record SET name = 'lost', created_at = '2000-01-01 00:00:00' WHERE id = :id2;
DELETE FROM ledger WHERE id = :id2;
ROLLBACK TO s;
UPDATE large_record SET name = 'written ' || $moment, created_at = $moment\::timestamp
	WHERE id = :id2;
END;
} ],
	rollback => [
		2, qq{
\\set id random(1001, $rows)
BEGIN;
UPDATE large_record SET name = 'lost', created_at = '2000-01-01 00:00:00' WHERE id = :id;
INSERT INTO large_record (name, created_at) VALUES ('lost', '2000-01-01 00:00:00');
ROLLBACK;
} ],
	read => [
		4, qq{
\\set id random(1, $rows)
SELECT id, name, created_at FROM large_record WHERE id = :id;
} ],
	lab => [
		2, qq{
BEGIN;
SELECT risky_migrations.lab_write(1000);
INSERT INTO calls VALUES (1);
END;
} ]);

my $dir = PostgreSQL::Test::Utils::tempdir;
my @files;
foreach my $name (sort keys %script)
{
	my ($weight, $text) = @{ $script{$name} };
	PostgreSQL::Test::Utils::append_to_file("$dir/$name.sql", $text);
	push @files, '-f', "$dir/$name.sql\@$weight";
}

my $pgbench;

sub begin_pgbench
{
	my ($protocol) = @_;
	$pgbench = start_pgbench($dir, '-R', '300', '-M', $protocol, '-c', $clients, '-j', '2', @files);
	return;
}

# Waits until some further transactions have been made.
sub let_pgbench_write
{
	my $from = sql(q{SELECT last_value FROM moments});
	wait_for("SELECT last_value > $from + 200 FROM moments", 'pgbench writes nothing');
	return;
}

sub stop_pgbench
{
	my ($name) = @_;
	my $ok = end_pgbench($pgbench);
	my $out = slurp_file("$dir/out");
	my ($made, $asked, $failed) = (0, 0, 0);
	while ($out =~ /actually processed: (\d+)\/(\d+)/g)
	{
		$made += $1;
		$asked += $2;
	}
	$failed += $1 while $out =~ /number of failed transactions: (\d+)/g;
	ok($ok, "$name: pgbench goes through");
	is(slurp_file("$dir/err") =~ s/^pgbench \(.*\n//mgr, '', "$name: pgbench has nothing to complain of");
	cmp_ok($made, '>', 0, "$name: $made transactions");
	is("$made $failed", "$asked 0", "$name: no transaction failed");
	return;
}

sub check
{
	my ($name) = @_;
	is(sql('SELECT rows_wrong FROM rm_lab_check()'), 0, "$name: every value is that of its row's name");
	is( sql(q{
SELECT count(*) FILTER (WHERE r.id IS NULL) AS lost,
	count(*) FILTER (WHERE l.id IS NOT NULL AND r.name <> l.name) AS other,
	count(*) FILTER (WHERE l.id IS NULL AND r.id > 1000) - (SELECT count(*) FROM calls) AS too_many,
	count(*) FILTER (WHERE r.id <= 1000) AS first_rows,
	count(r.id) - count(DISTINCT r.id) AS doubled
FROM ledger l FULL JOIN large_record r USING (id)}),
		'0|0|0|1000|0', "$name: the rows are those of the ledger");
	return;
}

# One step, with writes before, during and after.
sub migrate
{
	my ($target) = @_;
	let_pgbench_write();
	sql("CALL rm_migrate('$target')");
	check("at $target");
	let_pgbench_write();
	check("at $target, later");
	return;
}

# ---------------------------------------------------------------------------
# The three steps, with prepared statements
# ---------------------------------------------------------------------------

begin_pgbench('prepared');
migrate('0003');
migrate('0004');
is( sql('SELECT count(*) FROM large_record WHERE created_at_new IS NULL'),
	0, 'after 0004 no row is without its new value');
migrate('0005');
is(sql(q{SELECT string_agg(applied, '' ORDER BY number) FROM rm_showmigrations()}),
	'[X][ ][X][X][X]', '0005 is applied, without 0002');
migrate('0004');
migrate('0003');
migrate('0005');
migrate('0001');
stop_pgbench('three steps');
check('three steps, in the end');

# in batches, and with what a user calls
begin_pgbench('prepared');
sql(q{CALL rm_add_column('large_record', 'created_at', 'timestamp', 'created_at::timestamp')});
sql(q{
SET risky_migrations.max_row_lock_time = '1 ms';
SET risky_migrations.lock_timeout = '50 ms';
CALL rm_backfill_batched(700);
});
check('rm_backfill_batched');
sql('CALL rm_enforce_not_null()');
check('rm_enforce_not_null');
sql('CALL rm_rollback()');
stop_pgbench('by hand');
check('by hand, in the end');

# ---------------------------------------------------------------------------
# The direct change: statements that know no type
# ---------------------------------------------------------------------------

begin_pgbench('simple');
migrate('0002');
is( sql(q{SELECT format_type(atttypid, atttypmod) FROM pg_attribute
	WHERE attrelid = 'large_record'::regclass AND attname = 'created_at'}),
	'timestamp without time zone', '0002 has changed the type');
migrate('0001');
migrate('0003');
migrate('0002');
migrate('0001');
stop_pgbench('direct');
check('direct, in the end');
is( sql(q{SELECT format_type(atttypid, atttypmod) FROM pg_attribute
	WHERE attrelid = 'large_record'::regclass AND attname = 'created_at'}),
	'character varying(50)', 'the type is the old one again');
is( sql(q{SELECT count(*) FROM pg_attribute
	WHERE attrelid = 'large_record'::regclass AND attnum > 0 AND NOT attisdropped}),
	3, 'and so are the columns');

$node->stop;
done_testing();
