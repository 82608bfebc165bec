# Locks on several tables beside clients that take them in either order, without
# a pause: whoever has the second already stands behind the one who has the first.
# The migration comes through all the same; no client meets a deadlock, and none
# waits for longer than one try may take.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $bound = 250;

my $node = start_server('opposing_orders', qq{
log_line_prefix = '%m [%p] %a '
log_lock_waits = on
deadlock_timeout = 10ms
autovacuum = off
synchronous_commit = off
risky_migrations.lock_timeout = $bound
risky_migrations.lock_retries = 12
});
sql(q{
CREATE TABLE city (code varchar(50) PRIMARY KEY, id int NOT NULL UNIQUE, n int);
CREATE TABLE visit (id bigint GENERATED ALWAYS AS IDENTITY, city int REFERENCES city (id), code varchar(50) REFERENCES city);
INSERT INTO city SELECT g, g, 0 FROM generate_series(1, 20) g;
});

# Two runs of pgbench, so that one is at work while the other begins anew.
my %script = (
	city => q{UPDATE city SET n = n + 1 WHERE id = :client_id + :from},
	visit => q{INSERT INTO visit (city) VALUES (NULL)});
my @runs;
foreach my $run (0, 1)
{
	my $dir = PostgreSQL::Test::Utils::tempdir;
	my @files;
	foreach my $order ([qw(city visit)], [qw(visit city)])
	{
		my $file = "$dir/$order->[0].sql";
		PostgreSQL::Test::Utils::append_to_file($file, join(";\n", 'BEGIN', map({ $script{$_} } @$order), 'COMMIT;'));
		push @files, '-f', $file;
	}
	push @runs, { dir => $dir, arguments => [ '-c', 4, '-j', 1, '-t', 1500 + 600 * $run,
		'-D', 'from=' . (1 + 10 * $run), @files ] };
}

foreach my $case (
	[ 'online_rewrite', q{CALL rm_alter_type('city', 'id', 'bigint', method => 'online_rewrite');}, q{SELECT pg_typeof(max(id)) FROM city}, 'bigint' ],
	[ 'three_step', q{CALL rm_alter_type('city', 'id', 'int'); CALL rm_cleanup();}, q{SELECT pg_typeof(max(id)) FROM city}, 'integer' ],
	[ 'direct', q{CALL rm_alter_type('city', 'code', 'varchar(100)', method => 'direct');},
		q{SELECT count(*) FROM rm_migrations WHERE method = 'direct' AND state = 'done'}, '1' ])
{
	my ($method, $calls, $question, $answer) = @$case;
	my $from = -s $node->logfile;
	$_->{pgbench} = start_pgbench($_->{dir}, @{ $_->{arguments} }) foreach @runs;
	wait_for(q{SELECT count(*) = 8 FROM pg_stat_activity WHERE application_name = 'pgbench'}, 'pgbench does not run');

	my $start = time;
	my $call = start_call('migration', split /(?<=;) ?/, $calls);
	ends_well($call, "$method: it comes beside them");
	note sprintf('%s: %.1f s, %s tries', $method, time - $start,
		sql(q{SELECT string_agg(format('%s %s', step, lock_retries), ', ' ORDER BY id) FROM risky_migrations.step_log}));
	ok(end_pgbench($_->{pgbench}), "$method: no client's transaction failed") or diag slurp_file("$_->{dir}/err") foreach @runs;
	is(sql($question), $answer, "$method: the type is another one");

	my $log = slurp_file($node->logfile, $from);
	unlike($log, qr/deadlock detected/, "$method: there was no deadlock");
	my @waits = sort { $a <=> $b }
	  $log =~ /\] pgbench LOG:  process \d+ (?:acquired|still waiting for) \w+ on relation .*? after ([\d.]+) ms/g;
	note scalar(@waits) . " waits, the longest $waits[-1] ms" if @waits;
	cmp_ok(@waits ? $waits[-1] : 0, '<=', $bound + 100, "$method: nobody waits for longer than a try");
}

$node->stop;
done_testing();
