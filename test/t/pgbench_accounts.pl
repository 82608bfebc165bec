# pgbench's own tables and its standard script, beside whole migrations.
#
# Four clients run TPC-B on tables with foreign keys, while a column of them is
# changed from int to bigint: a primary key that another table refers to, one
# that three tables refer to, and a column that refers to another table.  Each
# is swapped and taken back, then swapped and cleaned up.  No transaction may
# fail, every sum must agree with what pgbench says to have done, and the
# catalogs must say what they would after ALTER TABLE.
#
# What the clients wait for is read from the server's own records
# (log_lock_waits with a small deadlock_timeout).  They wait for each other too,
# since there are but two branches: a wait is the migration's if one of its
# processes held the lock or stood in the queue before the client.  How long is
# measured by the machine's clock, which a busy machine makes a poor witness; so
# the bound is not the lock_timeout and a bit, which is only shown, but a time
# that clients would exceed many times if they had to stand behind the migration.
# That they would is shown last: a reader keeps the migration from its lock for
# many of its tries, and each client waits for one of them at most.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my $scale = 2;
my $clients = 4;
# the default, in ms
my $lock_timeout = 250;
my $promised = $lock_timeout + 100;

my $node = start_server('pgbench_accounts', qq{
log_line_prefix = '%m [%p] %a '
log_lock_waits = on
deadlock_timeout = 5ms
autovacuum = off
max_worker_processes = 20
risky_migrations.lock_timeout = $lock_timeout
risky_migrations.lock_retry_max_delay = 200
});
$node->command_ok(
	[ 'pgbench', '-q', '-i', '-I', 'dtgvpf', '-s', $scale, $node->connstr('postgres') ],
	'pgbench makes its tables, with foreign keys');

my $dir = PostgreSQL::Test::Utils::tempdir;
my $transactions = 0;

# ---------------------------------------------------------------------------
# What the clients wait for
# ---------------------------------------------------------------------------

# The waits of pgbench's clients in the log since that position, each with its
# length in ms so far as it is known and whether it is the migration's: one of
# its processes is named by the server as a holder, or before the client in the
# queue.  Whoever asks for a lock on a table can only stand behind it.
sub waits
{
	my ($from) = @_;
	my (%migration, %waiting, @waits);
	my $log = slurp_file($node->logfile, $from);

	$migration{$1} = 1 while $log =~ /\[(\d+)\] (?:migration|risky_migrations)\b/g;
	while ($log =~ /\[(\d+)\] pgbench (LOG|DETAIL):  (.*)/g)
	{
		my ($pid, $what, $text) = ($1, $2, $3);
		if ($text =~ /^process \d+ still waiting for \w+ on (\w+) .*? after ([\d.]+) ms/)
		{
			push @waits, $waiting{$pid} = { for => $1, ms => $2, text => $text, ours => $1 eq 'relation' };
		}
		elsif ($text =~ /^Process(?:es)? holding the lock: ([\d, ]+)\. Wait queue: ([\d, ]*)/ && $waiting{$pid})
		{
			my ($holders, $queue) = ($1, $2);
			foreach my $other (split(/, /, $holders), split(/, /, $queue))
			{
				last if $other == $pid;
				$waiting{$pid}{ours} = 1 if $migration{$other};
			}
		}
		elsif ($text =~ /^process \d+ acquired \w+ on .*? after ([\d.]+) ms/ && $waiting{$pid})
		{
			$waiting{$pid}{ms} = $1;
			delete $waiting{$pid};
		}
	}
	return @waits;
}

# Says how long they were, and that none was a wall of $much ms.
sub check_waits
{
	my ($name, $from, $much) = @_;
	my @all = waits($from);
	my @ours = sort { $a <=> $b } map { $_->{ms} } grep { $_->{ours} } @all;
	my @above = grep { $_ > $promised } @ours;
	my ($median, $worst) = @ours ? ($ours[ @ours / 2 ], $ours[-1]) : (0, 0);

	note sprintf '%s: %d waits of clients, %d for the migration: median %d ms, longest %d ms, %d above %d ms',
	  $name, scalar(@all), scalar(@ours), $median, $worst, scalar(@above), $promised;
	cmp_ok($worst, '<', $much, "$name: no client stands behind the migration");
	cmp_ok($median, '<', $promised, "$name: most wait no longer than is promised");
	return scalar(@ours);
}

# ---------------------------------------------------------------------------
# pgbench, its count and the sums
# ---------------------------------------------------------------------------

my $pgbench;

sub begin_pgbench
{
	my ($protocol) = @_;
	$pgbench = start_pgbench($dir, '-b', 'tpcb-like', '-R', '300', '-M', $protocol, '-c', $clients, '-j', '2');
	return;
}

# Waits until some further transactions have been made.
sub let_pgbench_write
{
	my $made = sql('SELECT count(*) FROM pgbench_history');
	wait_for("SELECT count(*) > $made + 100 FROM pgbench_history", 'pgbench writes nothing');
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
	is("$made $failed", "$asked 0", "$name: no transaction of $made failed");
	$transactions += $made;
	is( sql(q{
SELECT (SELECT count(*) FROM pgbench_history),
	(SELECT sum(abalance) FROM pgbench_accounts) = s AND (SELECT sum(tbalance) FROM pgbench_tellers) = s
	AND (SELECT sum(bbalance) FROM pgbench_branches) = s
FROM (SELECT sum(delta) AS s FROM pgbench_history) h}),
		"$transactions|t", "$name: as many rows of history as transactions, and all sums agree");
	is( sql(q{
SELECT count(*) FROM (SELECT aid, sum(delta) AS s FROM pgbench_history GROUP BY aid) h
	FULL JOIN (SELECT aid, abalance FROM pgbench_accounts WHERE abalance <> 0) a USING (aid)
WHERE coalesce(h.s, 0) <> coalesce(a.abalance, 0)}),
		0, "$name: and those of every account");
	return;
}

# ---------------------------------------------------------------------------
# The migrations
# ---------------------------------------------------------------------------

# what the catalogs say of the four tables; the order of columns is not told
sub shape
{
	return sql(q{
SELECT string_agg(line, E'\n' ORDER BY line) FROM (
	SELECT format('%s.%s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull)
	FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
	WHERE relname LIKE 'pgbench%' AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
	UNION ALL
	SELECT format('%s %s', indexrelid::regclass, pg_get_indexdef(indexrelid)) FROM pg_index JOIN pg_class c ON c.oid = indrelid
	WHERE relname LIKE 'pgbench%' AND indisvalid
	UNION ALL
	SELECT format('%s %s %s %s', conrelid::regclass, conname, convalidated, pg_get_constraintdef(k.oid))
	FROM pg_constraint k WHERE conrelid::regclass::text LIKE 'pgbench%' AND contype <> 'n'
	UNION ALL
	SELECT format('trigger %s %s', tgrelid::regclass, tgname) FROM pg_trigger WHERE NOT tgisinternal) l (line)});
}

sub type_of
{
	my ($table, $column) = @_;
	return sql(qq{SELECT format_type(atttypid, atttypmod) FROM pg_attribute
		WHERE attrelid = '$table'::regclass AND attname = '$column'});
}

# Calls that, as the migration; true if it went well.
sub migrate
{
	my ($name, @calls) = @_;
	my $call = start_call('migration', @calls);
	ends_well($call, $name);
	return;
}

# Changes the column beside pgbench, and ends with that call.
sub under_pgbench
{
	my ($protocol, $table, $column, $end) = @_;
	my $name = "$table.$column, $end";
	my $before = shape();
	(my $after = $before) =~ s/^(\Q$table.$column\E) integer/$1 bigint/m;
	my $from = -s $node->logfile;

	begin_pgbench($protocol);
	let_pgbench_write();
	migrate("$name: swapped", "CALL rm_alter_type('$table', '$column', 'bigint')");
	is(type_of($table, $column), 'bigint', "$name: the type is the new one");
	let_pgbench_write();
	migrate("$name: done", "CALL $end()");
	let_pgbench_write();
	stop_pgbench($name);
	check_waits($name, $from, 4 * $promised);
	is(shape(), $end eq 'rm_rollback' ? $before : $after, "$name: the catalogs");
	note sql(q{
SELECT string_agg(format('%s %s %s ms, %s tries more', step, direction, round(duration_ms), lock_retries), '; ' ORDER BY id)
FROM risky_migrations.step_log WHERE migration_id = (SELECT max(id) FROM risky_migrations.migration)});
	return;
}

foreach my $case ([ 'pgbench_accounts', 'aid' ], [ 'pgbench_branches', 'bid' ], [ 'pgbench_history', 'aid' ])
{
	under_pgbench('simple', @$case, 'rm_rollback');
	under_pgbench('prepared', @$case, 'rm_cleanup');
}

# ---------------------------------------------------------------------------
# A reader that stays
# ---------------------------------------------------------------------------

# It keeps the migration from its lock for so many tries that whoever had to
# wait for all of them would wait many times longer than anybody does.
my $tries = 12;
my $from = -s $node->logfile;
begin_pgbench('simple');
let_pgbench_write();
my $reader = start_call('reader', 'BEGIN', 'SELECT count(*) FROM pgbench_tellers',
	'SELECT pg_sleep(600)');
wait_for(q{SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'reader' AND wait_event = 'PgSleep'},
	'the reader does not read');
my $call = start_call('migration', 'SET risky_migrations.lock_retries = 10000',
	q{CALL rm_alter_type('pgbench_tellers', 'tid', 'bigint')});
my $begun = time;
sub tries { return sql(q{SELECT coalesce(max(waiting_reason), '') FROM rm_progress}) =~ /in (\d+) tries/ ? $1 : 0 }
usleep(50_000) while tries() < $tries && time - $begun < $PostgreSQL::Test::Utils::timeout_default;
my $wall = 1000 * (time - $begun);
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'reader'});
finish_call($reader);
ends_well($call, 'a reader that stays: the migration gets its lock when it is gone');
migrate('a reader that stays: cleaned up', 'CALL rm_cleanup()');
stop_pgbench('a reader that stays');
note sprintf 'the reader was in the way for %d ms', $wall;
cmp_ok($wall, '>', $tries * $lock_timeout, 'a reader that stays: it was in the way for all these tries');
cmp_ok(check_waits('a reader that stays', $from, $wall / 2),
	'>', $tries, 'a reader that stays: clients did wait, once for each try');
is(type_of('pgbench_tellers', 'tid'), 'bigint', 'a reader that stays: the type is the new one');

$node->stop;
done_testing();
